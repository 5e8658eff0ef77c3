"""``aiovm locks``: the same workload under each lock, and what overcommitting did to it."""
