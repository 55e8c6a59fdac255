"""Measures the loss: cases, floors and peers, the suites, and the page made from their results."""
