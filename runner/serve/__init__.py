"""The server: requests over HTTP, answered by the engine. Importing it needs the extra `serve`."""
