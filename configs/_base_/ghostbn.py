"""What a GhostBN config adds: ghosts of 4 images, of those of all GPUs."""
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='GhostBN', ghost_size=4, sync=True)
# In a box head examples are regions: 512 of an image.
region_norm_cfg = dict(type='GhostBN', ghost_size=2048, sync=True)
