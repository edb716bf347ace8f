"""raypipe: distributed LLM and recommender pipelines on Ray."""

__version__ = "0.1.0"
