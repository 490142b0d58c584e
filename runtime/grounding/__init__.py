"""Ground queries in videos, evaluate the results, and format and plot them."""
