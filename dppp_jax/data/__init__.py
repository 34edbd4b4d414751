"""Pictures of people into batches: readers, sampling, augmentation."""
