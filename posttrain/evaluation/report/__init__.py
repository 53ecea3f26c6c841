"""The report of a run: results, curves and the HTML page."""
