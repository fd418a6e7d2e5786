"""Folders of sorted images."""

from deepclust.commands.predict_folders import make_folder_name


def test_folders_have_the_number_and_the_name() -> None:
    names = {3: "../black  cats/", 4: "x" * 999, 5: "?!", 6: "Füße"}
    assert make_folder_name(2, names) == "cluster_002"
    assert make_folder_name(3, names) == "cluster_003_black_cats"
    assert make_folder_name(4, names) == "cluster_004_" + "x" * 60
    assert make_folder_name(5, names) == "cluster_005" and make_folder_name(6, names) == "cluster_006_Füße"
