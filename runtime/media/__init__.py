"""Decode video files, extract clip features and write clips."""

from __future__ import annotations
