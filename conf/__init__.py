"""What can be chosen: one short YAML file per choice, read by Hydra as `pkg://delta_transfer.conf`."""
