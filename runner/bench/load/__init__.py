"""A load generator for servers of OpenAI's API, and what it measures."""
