"""Settings of noise-contrastive estimation, as they stand in `params.yaml`."""
