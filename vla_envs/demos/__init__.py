"""Demonstrations: the scripted expert that plays them, and the data sets that hold them."""
