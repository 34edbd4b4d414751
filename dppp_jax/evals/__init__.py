"""Retrieval metrics, re-ranking, feature extraction, reports."""
