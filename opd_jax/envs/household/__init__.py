"""The embedded household: ALFWorld's task types in a world of our own."""
