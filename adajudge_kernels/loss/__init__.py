"""Focal Bradley-Terry loss."""
