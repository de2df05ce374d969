"""TensorRT's parser rules, as a lint."""
