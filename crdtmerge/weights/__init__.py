"""Files: strict safetensors reading, reproducible writing, checkpoint folders, tensor digests."""
