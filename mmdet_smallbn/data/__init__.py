"""ShapesCOCO, the small detection data set of the demo and the tests."""
