"""The built-in judge: its generated world, how it is trained from nothing, and the trained judge itself."""
