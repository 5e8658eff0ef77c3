"""The engines behind one protocol (:mod:`aiovm.engine.base`)."""
