"""Read data sets in their published layouts into one form."""
