"""Study of small batches: where BatchNorm loses accuracy, and what helps."""
