"""The paper's experiments: plans of runs, their execution, and the statistics of their scores."""
