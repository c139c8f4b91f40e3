"""What the data scripts share: files, encodings, orders, readers and generators of the five tasks."""
