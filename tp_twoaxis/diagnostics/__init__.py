"""The paper's evidence on a network of one's own, one file a question; models are read and never changed."""
