"""What is learned from the model about rows of data: losses, embeddings, gradients."""
