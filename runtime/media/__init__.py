"""Decode video files, extract clip features and write clips."""
