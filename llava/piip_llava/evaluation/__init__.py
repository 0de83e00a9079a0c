"""Benchmarks with LLaVA-1.5's questions and prompts, run by lmms-eval."""
