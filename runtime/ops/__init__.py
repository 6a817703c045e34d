"""Named operations: schema, reference, fake implementation and kernel, one file each."""
