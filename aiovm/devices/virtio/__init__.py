"""virtio devices behind the memory-mapped transport, one device a module (Virtio 1.2)."""
