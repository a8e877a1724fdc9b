"""What norms cost, measured side by side."""
