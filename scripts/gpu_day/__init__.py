"""Everything that a GPU should tell about this product, by one command in eight minutes; see docs/contributing/gpu.md.

It needs torch and NumPy alone. The markers of `annotated_types` get a stand-in where that package is missing.
"""

from scripts.gpu_day.stand_in import provide_annotated_types

provide_annotated_types()
