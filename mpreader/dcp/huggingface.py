"""Storage reader of safetensors files on S3, for ``torch.distributed.checkpoint`` (DCP).

It differs from the storage reader of DCP's own files in two points: the metadata is made from the headers of the files
instead of being read from ``.metadata``, and an item is the bytes of a tensor without a record, so that nothing can be
verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from mpreader.collector import collector_paused, spare_new_objects
from mpreader.dcp.filesystem import Path
from mpreader.dcp.headers import metadata_of
from mpreader.dcp.reader import S3StorageReader
from mpreader.fetch.fetcher import SharedPoolFetcher
from mpreader.fetch.safetensors import SUFFIX, files_of, opened
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.readers.protocols import StoredItem

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["S3HuggingFaceStorageReader"]


class S3HuggingFaceStorageReader(S3StorageReader):
    """Storage reader of a directory of safetensors files on S3, in the place of torch's ``HuggingFaceStorageReader``.

    Any program may have written the files. Those in which torch's ``HuggingFaceStorageWriter`` has saved pieces of
    tensors, rank by rank, are read too. With a ``model.safetensors.index.json`` only the files that it names are read,
    without one all that end with ``.safetensors``. Tensors are read from the versions whose headers were read.

    Args:
        region: The bucket's region. None: the configuration's, or the environment's.
        path: ``s3://`` URI of the directory, or of a single file, which ends with ``.safetensors``.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        progress: True shows a progress bar on stderr during a load, False shows none. None: on a terminal or in a
            notebook, and only in the first of several ranks.
        share_host: True: the ranks of a job that run on one host receive together what they need, each byte once.
            False: each rank receives by itself. Headers are read by each rank in either case.
        kwargs: Further arguments of torch's ``FileSystemReader``, according to torch's version.

    Raises:
        ValueError: ``path`` is not an ``s3://`` URI.
    """

    def __init__(
        self,
        region: str | None,
        path: Path,
        s3client_config: S3ClientConfig | None = None,
        *,
        pool_config: PoolConfig | None = None,
        progress: bool | None = None,
        share_host: bool = True,
        **kwargs: Any,
    ) -> None:
        self._constructor = S3ReaderConstructor.multiprocess(pool_config=pool_config, progress=progress)
        super().__init__(
            region,
            path,
            s3client_config,
            self._constructor,
            verify=False,  # the format has no checksums
            share_host=share_host,
            **kwargs,
        )
        self._pool_config = pool_config

    # Without the further arguments of the base class: torch takes a reader that has them for one whose ranks may have
    # metadata of their own, and would ask for that when the headers can't be read.
    def read_metadata(self) -> Metadata:
        """Read the headers of the files, all at the same time.

        Raises:
            HeaderRefused: A header is damaged, or the files contradict each other.
            ObjectMissing: There is no safetensors file, or the index names one that is missing.
            PlanError: The index is damaged.
            TransportError: A header can't be read.
        """
        directory, config = self._directory(), self._fs.client.s3client_config
        for_host = self._may_share() and self._leads()
        self._constructor.use_client(self._fs.client)
        self._constructor.start(for_host=for_host)  # so that the pool ends with the reader
        with (
            SharedPoolFetcher(config, self._pool_config, for_host=for_host) as fetcher,
            opened(fetcher, files_of(fetcher, str(self.path)), has_pieces=True) as files,
            collector_paused(),
        ):
            metadata = metadata_of({file.uri[len(directory) + 1 :]: file.header for file in files})
            self._versions = {file.uri: file.version for file in files}
            spare_new_objects()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _directory(self) -> str:
        """Returns the URI that the paths of the files are relative to, without a slash at its end."""
        uri = str(self.path)
        return uri.rpartition("/")[0] if uri.endswith(SUFFIX) else uri.rstrip("/")

    def _own_load(self) -> tuple[Path, dict[MetadataIndex, StoredItem]]:
        _, storage_data = super()._own_load()
        return self._directory(), storage_data
