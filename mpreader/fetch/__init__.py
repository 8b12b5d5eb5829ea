"""Range fetches: RangeFetcher, AsyncRangeFetcher, fetch_ranges."""
