"""A lint that checks a graph against the rules of TensorRT's parser."""
