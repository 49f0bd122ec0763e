"""Which files of a tree are secrets by their name, or by what they hold: they have no place in a record that others may read."""

import fnmatch
import re
from pathlib import PurePath

NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", ".my.cnf", ".htpasswd", ".git-credentials"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk", "*.pem", "*.key", "*.ppk"),
    *("*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "kubeconfig"),
    *("credentials", "credentials.*", "*credentials.json", "client_secret*.json", "service[-_]account*.json"),
    *("secret", "secrets", "secret.*", "secrets.*", ".secrets", "token", "*.token", "hf_token*", "wandb_api_key*"),
)
"""Patterns of file names, lower case."""
PLACES = (".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".huggingface", ".kube", ".modal", ".ssh", ".secrets")
"""Directories whose files are secrets whatever their names."""
NO_SECRETS = ("*.example", "*.sample", "*.template", "*.dist", "*.pub", "*.py", "*.md")
"""Names that would fit, of files that show what a secret one looks like, or that are code."""

_NAMES, _NO_SECRETS = (re.compile("|".join(map(fnmatch.translate, patterns))) for patterns in (NAMES, NO_SECRETS))
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----")


def is_secret_by_name(name: str) -> bool:
    """Whether the file at the relative path `name` is well known to hold a secret."""
    path = PurePath(name.lower())
    if any(part in PLACES for part in path.parts[:-1]):
        return True
    return bool(_NAMES.match(path.name)) and not _NO_SECRETS.match(path.name)


def is_secret_by_content(name: str, content: bytes) -> bool:
    """Whether the file is a private key, or a JSON file that holds one, as those of service accounts do."""
    found = _PRIVATE_KEY.search(content)
    return found is not None and (name.lower().endswith(".json") or not content[: found.start()].strip())
