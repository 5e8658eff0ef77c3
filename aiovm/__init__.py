"""Linux KVM's vCPU as a citizen of asyncio."""
