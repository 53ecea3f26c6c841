"""Evaluating models: records, result cards, intervals, comparisons and reports."""
