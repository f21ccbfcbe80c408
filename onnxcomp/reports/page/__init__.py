"""report.html: the page of a report, one file that needs nothing else."""
