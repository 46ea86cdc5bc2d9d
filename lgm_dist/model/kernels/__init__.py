"""Fast versions of single operations, used if `ModelConfig.kernels` is "auto"; each has plain operations as its reference."""
