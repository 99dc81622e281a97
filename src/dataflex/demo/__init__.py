"""`python -m dataflex.demo`: what sample weighting does on data with wrong answers, in a few minutes on a CPU."""
