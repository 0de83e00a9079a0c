"""Image classification with PIIP: data, recipe, training and exact evaluation (arXiv 2406.04330, section 4.4)."""
