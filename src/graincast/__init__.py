"""Label-free grain segmentation: simulate grains, learn the microscope's look, train, measure."""

__version__ = "0.1.0"
