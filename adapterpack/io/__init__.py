"""Reading strictly and writing atomically. Nothing here knows what an adapter is."""
