"""The items of an offline run: listed, read, divided into windows, written; no models, no ranks."""
