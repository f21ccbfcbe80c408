"""Two models on the same data: how far apart their outputs are, how well each does its task, and gates on both."""
