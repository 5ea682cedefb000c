"""What scenes are made of: the built-in assets, and LIBERO's own meshes and textures."""
