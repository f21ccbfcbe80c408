"""Models timed against each other on this machine, each in a process of its own."""
