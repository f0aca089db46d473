from adapters import lora, run, save_original


def test_import_takes_loras_and_the_authors_adapters(tmp_path, capsys):
    lora().save_pretrained(tmp_path / "lora")
    code, out, _ = run(capsys, "import", tmp_path / "lora", tmp_path / "a", "--k", 4)
    assert (code, out) == (0, f"wrote {tmp_path}/a: GraLoRA with r=16, hybrid_r=0, k=4, alpha=24\n")
    code, out, _ = run(capsys, "import", tmp_path / "lora", tmp_path / "b", "--hybrid", "--r", 8)
    assert (code, out) == (0, f"wrote {tmp_path}/b: GraLoRA with r=8, hybrid_r=4, k=2, alpha=18\n")
    code, out, _ = run(capsys, "import", save_original(tmp_path / "original")[0], tmp_path / "c")
    assert (code, out) == (0, f"wrote {tmp_path}/c: GraLoRA with r=6, hybrid_r=2, k=3, alpha=20\n")
    code, _, err = run(capsys, "import", tmp_path / "a", tmp_path / "d")
    assert code == 2
    assert err.endswith("is a GraLoRA adapter in PEFT's format already; there is nothing to convert.\n")
