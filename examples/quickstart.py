"""The Python door in three steps, on data that scikit-learn brings: under a minute on one core.

    python examples/quickstart.py

It writes `photos/` and `outputs/` into the current folder, as the command `deepclust cluster` would.
"""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_iris, load_sample_images

import deepclust
from deepclust.estimators import DeepClustering

# A folder of photos: here squares that are cut from two photos, one of a palace, one of a flower.
photos = Path("photos")
photos.mkdir(exist_ok=True)
for name, photo in zip(("palace", "flower"), load_sample_images().images, strict=True):
    for number, top in enumerate(range(0, 384, 64)):
        for left in range(0, 640, 64):
            square = Image.fromarray(photo[top : top + 64, left : left + 64])
            square.save(photos / f"{name}-{number}-{left:03d}.png")

# 1. A folder of photos -> clusters and a report. The overrides make it short: leave them out for photos of your own.
short = {"num_seeds": 1, "images_seen": 2000, "min_epochs": 1, "min_steps": 200, "max_steps": 200}
result = deepclust.cluster(photos, num_clusters=4, overrides=short, verbose=False)
print(result)
print("the first photos are in the clusters", result.labels_[:5], "with confidence", result.confidence[:5].round(2))
print("pictures of the clusters:", result.run_dir / "report.html")  # result.show() opens it

# 2. An array of features -> clusters.
flowers = load_iris().data
print("flowers:", deepclust.cluster(flowers, num_clusters=3, overrides=["rule=kmeans"], verbose=False).labels_)

# The same in scikit-learn's manners, for pipelines and searches.
print("flowers:", DeepClustering(method="kmeans", n_clusters=3, random_state=0).fit_predict(flowers))

# 3. A finished run, loaded again and asked about new images.
run = deepclust.load_run(result.run_dir)
prediction = run.predict([photos / "palace-0-000.png", photos / "flower-3-320.png"])
print("new images:", prediction.labels_, prediction.confidence.round(2))
