"""Read and write the metadata in and beside model files, and encoded videos."""
