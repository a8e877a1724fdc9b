"""The small-batch study: where BatchNorm suffers, and what helps there."""
