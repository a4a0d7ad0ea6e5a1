"""The way through the rooms: what is registered is matched, loaded, proved and put in place."""
